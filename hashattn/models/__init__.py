"""What a Hugging Face model is to hashattn: its structure, and its identity."""
