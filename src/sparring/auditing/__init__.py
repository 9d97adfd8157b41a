"""What a run is: its plan, its evidence on disk, and (later) its verdicts."""
