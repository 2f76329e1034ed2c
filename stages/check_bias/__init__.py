"""Stage check_bias: representation and outcome balance by group."""
