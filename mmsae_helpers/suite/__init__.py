"""How a run is made and shown."""

import sys

# nbformat imports jsonschema, and that a grammar of URIs that takes two seconds to build and that no notebook needs
sys.modules.setdefault("rfc3987_syntax", None)
