"""What commands print and write as pages."""
