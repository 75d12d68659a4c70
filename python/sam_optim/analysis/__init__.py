"""Looking at sharpness."""
