"""What every room stands on: files, checks of values, the checkout. It imports no other room."""
