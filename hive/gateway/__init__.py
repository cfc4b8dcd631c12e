"""A request's way in: who asks, for which model, and the answer's way back."""
