"""Other libraries' ways to run models. Each module needs its own library, and imports it when it is used."""
