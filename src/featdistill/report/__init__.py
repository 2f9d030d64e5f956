"""Records to tables, figures and one self-contained page; drawn from files, without the models."""
