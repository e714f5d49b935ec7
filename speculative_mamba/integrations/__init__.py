"""Other people's frameworks; each module imports its own when it is used."""
