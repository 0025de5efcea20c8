"""By what pixels are normalised where nothing else is said: of ImageNet, red, green and blue, in steps of 1/255;
torchvision's and mmaction2's video models use them too.
"""

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
