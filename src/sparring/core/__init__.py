"""The words everything else is said in: threat models, rows, models, attacks, the judge. Torch only."""
