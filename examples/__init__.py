"""Programs that use the package; each is a folder with a README."""
