"""What became of a model, for people: summary, text, HTML, and the tables and bars of the command line."""
