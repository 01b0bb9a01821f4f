"""What ``bench submit new`` starts from: the smallest plugin of each kind, with its test. Names are replaced."""
