"""FLOP accounting, laws, fits, figures and the report (numpy + scipy)."""
