"""What would be done to a model: options, survey, plan."""
