"""Our training step beside that of the released Croc and ViCToR: a process for each project."""
