"""The operations as Triton kernels: kernel, launcher and launch settings by module. Nothing else imports triton."""
