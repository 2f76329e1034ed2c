"""Training on several processes: how many there are, who starts them, and what they tell each other."""
