"""The study of what funnels cost and save."""
