"""The methods, one file each; a method's formula is its ``passes()``."""
