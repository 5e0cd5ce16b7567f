"""CoSA at scale: weakly supervised semantic segmentation on Ray and MLflow."""
