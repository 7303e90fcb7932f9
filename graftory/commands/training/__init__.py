"""What `hub train` is made of besides its options: the search, where a prompt starts."""
