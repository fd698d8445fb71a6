// vattn._core.PagePool: the C++ class, argument for argument. vattn.PagePool wraps it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "bindings/bindings.hpp"

namespace {

using vattn::PagePool;

/// In the order of vattn.PoolStats, its members in the order of vattn.MemberStats.
nb::typed<nb::tuple, nb::any, nb::ellipsis> stats(const SharedPool& self) {
  vattn::PoolStats now;
  {
    const GilReleased release;
    now = self.pool->stats();
  }
  nb::list members;
  for (const vattn::MemberStats& member : now.members) {
    members.append(nb::make_tuple(member.name, member.mapped_bytes, member.retired_bytes, member.reclaimable_bytes));
  }
  return nb::make_tuple(now.created_bytes, now.mapped_bytes, now.pooled_bytes, now.retired_bytes, now.limit_bytes,
                        now.available_bytes, now.reclaimable_bytes, nb::tuple(members));
}

}  // namespace

void bind_page_pool(nb::module_& module) {
  using Release = nb::call_guard<GilReleased>;
  nb::class_<SharedPool>(module, "PagePool")
      .def(
          "__init__",
          [](SharedPool* self, const std::string& device, std::optional<std::int64_t> memory_limit,
             std::optional<std::int64_t> page_size) {
            const GilReleased release;
            new (self) SharedPool(PagePool::make(vattn::parse_device(device), memory_limit, page_size));
          },
          nb::arg("device"), nb::arg("memory_limit").none(), nb::arg("page_size").none())
      .def("page_size", [](const SharedPool& self) { return self.pool->page_size(); })
      .def(
          "memory_limit", [](const SharedPool& self) { return self.pool->memory_limit(); }, Release())
      .def(
          "set_memory_limit", [](const SharedPool& self, std::int64_t bytes) { self.pool->set_memory_limit(bytes); }, Release())
      .def("stats", &stats)
      .def(
          "close", [](const SharedPool& self) { self.pool->close(); }, Release())
      .def("is_closed", [](const SharedPool& self) { return self.pool->is_closed(); }, Release());
}
