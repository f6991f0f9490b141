"""Does the entropy estimate give back a dispersion that is known?"""
