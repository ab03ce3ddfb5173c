"""Write to terminals and pipes: tables that fit, progress, and names that were mistyped."""
