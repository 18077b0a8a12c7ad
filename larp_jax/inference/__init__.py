"""What turns a trained model into files: codes, reconstructions, samples."""
