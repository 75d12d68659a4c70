"""Inside trainers that make the steps themselves."""
