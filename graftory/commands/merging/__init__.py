"""What `hub merge` is made of: weights, tuned methods, the report."""
