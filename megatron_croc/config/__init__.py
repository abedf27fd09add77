"""What a run is: dataclasses, reading and changing them, and their checks. No torch here."""
