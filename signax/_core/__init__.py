"""What every other wing uses: checks of options, leaves of trees, and arithmetic."""
