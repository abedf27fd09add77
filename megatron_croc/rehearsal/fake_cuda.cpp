// A CUDA device that exists for torch's autograd engine and does nothing.
//
// A backward pass over fake `cuda` tensors asks for a device guard, for streams and for the CUDA
// hooks. A CPU build of torch has none of them, and those of a CUDA build need a GPU.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto kCuda = c10::DeviceType::CUDA;

struct FakeHooks : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
};

struct FakeGuard : c10::impl::NoOpDeviceGuardImpl<kCuda> {
  c10::Device exchangeDevice(c10::Device) const override { return {kCuda, 0}; }
  c10::Device getDevice() const override { return {kCuda, 0}; }
  c10::Stream only() const { return c10::Stream(c10::Stream::DEFAULT, c10::Device(kCuda, 0)); }
  c10::Stream getStream(c10::Device) const noexcept override { return only(); }
  c10::Stream getNewStream(c10::Device, int) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

}  // namespace

extern "C" int install_fake_cuda() {
  // The one hooks object lives as long as the process and has no members, so it can get another
  // table of virtual functions.
  static FakeHooks* hooks = new FakeHooks();
  auto& existing = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(&existing) = *reinterpret_cast<void**>(hooks);
  c10::impl::registerDeviceGuard(kCuda, new FakeGuard());
  return at::detail::getCUDAHooks().hasCUDA();
}
