"""Types, errors and seeds: what every other part stands on and what imports none of them."""
