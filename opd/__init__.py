"""On-policy distillation of many domain teachers into one mixture-of-experts student (DeepSeek-V4, arXiv:2606.19348, 5.1.2)."""
