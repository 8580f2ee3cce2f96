"""What replicas say to one another: results, and whether they still agree."""
