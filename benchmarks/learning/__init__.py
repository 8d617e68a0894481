"""What each method learns on two cores: sweeps, figures over seeds, the check that it still learns."""
