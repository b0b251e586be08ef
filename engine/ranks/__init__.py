"""One model on several processes: what each holds, what they say to each other, and what it costs."""
