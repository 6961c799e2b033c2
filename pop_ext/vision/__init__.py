"""Pictures as features in the decoder's hidden space."""
