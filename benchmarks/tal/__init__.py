"""The flagship: temporal action localization on ActivityNet-1.3 and THUMOS-14, the backbone trained through the localizer on long videos."""
