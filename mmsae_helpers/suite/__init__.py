"""How a run is made and shown."""
