"""Training: the loop, its resumable state, and what the three training stages share."""
