"""Files of many prompts, a JSON object a line, and the files of their answers."""
