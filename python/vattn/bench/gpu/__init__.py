"""The GPU suite: one file a question. E0 `driver`, E3 `step`, E4 `decode`, E5 `batch`; E1 and E2 are the kernels'.

Without a GPU every benchmark runs on the fake libcuda of the tests (`Settings.fake_cuda`): that shows that the code
works and what its cases hold. No figure of such a run says anything about a GPU, and its facts say ``fake: true``.
"""
