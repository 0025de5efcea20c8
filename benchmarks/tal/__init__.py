"""The flagship: temporal action localization on ActivityNet-1.3 and THUMOS-14, trained end to end, from videos to
segments.
"""
