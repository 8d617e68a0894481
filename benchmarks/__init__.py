"""Speed of the ops beside the papers' formulas and the best of plain torch: `make bench`."""
