"""What the documentation's site is made of besides its Markdown: results that can be sorted, notebooks as pages."""
