"""One YAML file for each experiment: a short diff over the defaults."""
