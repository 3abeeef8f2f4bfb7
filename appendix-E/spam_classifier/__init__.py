"""Chapter 6's spam classifier, fine-tuned with `lora` on the `fast_path`."""
