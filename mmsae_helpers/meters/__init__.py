"""What is computed from one pass over tokens, and what follows from it."""
