"""What a decode step costs on a Mac, from its graph alone: `budget.py` prints it."""
