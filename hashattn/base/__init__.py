"""What every room stands on: files, checks of values, the checkout. Imports errors alone."""
