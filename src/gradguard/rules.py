"""The rule catalogue: codes, names, families. (Explanations follow.)"""
