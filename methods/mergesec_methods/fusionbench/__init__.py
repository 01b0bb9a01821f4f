"""FusionBench's merge methods through an adapter."""
